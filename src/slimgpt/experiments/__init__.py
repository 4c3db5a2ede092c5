"""Recipes: tables of many runs."""
