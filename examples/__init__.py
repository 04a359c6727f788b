"""What can be done with semiseg beyond its verbs."""
