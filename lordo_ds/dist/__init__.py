"""Everything that crosses replicas: groups, wire, byte ledger, and the outer sync."""
