"""Process groups, and what is sent in them: every operation is entered in a byte ledger."""
