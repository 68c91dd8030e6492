"""Recipes shipped with siman, one YAML file each; installed as `siman_convert.recipes` and read as package resources."""
