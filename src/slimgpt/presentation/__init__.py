"""Show results as text tables and charts. Imports no other package of SlimGPT except runtime."""
