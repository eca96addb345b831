"""From words to one checked plan, before torch is imported."""
