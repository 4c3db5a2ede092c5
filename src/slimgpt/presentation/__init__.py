"""How results are shown: tables of text, and charts. It gets data and knows no other package."""
