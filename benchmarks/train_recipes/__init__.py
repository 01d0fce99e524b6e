"""One module a recipe. Each trains on the subject's rows in a process of its own and prints its figures as JSON."""
