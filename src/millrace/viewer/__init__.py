"""The page on which people look at runs: curves, engines and samples. It reads the files of a run's folder."""
