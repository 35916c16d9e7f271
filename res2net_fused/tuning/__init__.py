"""`tune(model, *inputs)`: every choice for every block measured on this machine, before it matters."""
