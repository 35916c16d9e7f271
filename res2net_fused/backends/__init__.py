"""One module per way to run the chain; `selection` chooses among them."""
