"""Studies: arms × seeds over a recipe, and their comparison.

Their plan, the record of finished runs, and the table.
"""
