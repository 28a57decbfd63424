"""One merge method per file; `weightsmith.merging.parameter` tells the protocol they follow."""
