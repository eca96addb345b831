"""Pure tensor functions: no modules, no state, nothing imported from the package above."""
