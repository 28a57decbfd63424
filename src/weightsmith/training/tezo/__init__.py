"""TeZO, MeZO and LOZO, optimisers that need forward passes only: `from weightsmith.training import TeZO`."""
