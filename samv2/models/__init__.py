"""Loading dense models, the assembler, adapters, and saving."""
