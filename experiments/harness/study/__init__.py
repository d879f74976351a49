"""What a study says: its numbers, and the table and files made from them."""
