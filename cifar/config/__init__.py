"""Configuration: `schema` (the keys of every run), `resolve` (layers -> one configuration), `yaml_loader`, `shipped`."""
