"""The report of an evaluation for people: one HTML page, and a table of cases."""
