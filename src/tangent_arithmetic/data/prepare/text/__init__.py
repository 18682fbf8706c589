"""How the tables of the suite `text` are made of archives of package registries."""
