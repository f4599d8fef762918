"""The words every room shares: specs, batch keys, provenance, errors. Types and checks, no behaviour."""
