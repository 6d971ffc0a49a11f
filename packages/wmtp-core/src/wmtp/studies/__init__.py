"""Studies: arms × seeds over a recipe, their plan, the record of finished runs, and the table that compares them."""
