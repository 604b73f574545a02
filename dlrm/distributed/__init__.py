"""Several ranks: starting them, placing tables on them, and what they exchange. Imports no torch by itself."""
