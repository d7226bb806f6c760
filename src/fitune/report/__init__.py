"""What runs measured, side by side: run directories in, a Comparison out, and tables, pictures and pages of it."""
