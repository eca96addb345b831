"""Methods produce a permutation for a site; one file per class, one YAML per preset."""
