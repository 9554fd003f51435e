"""One model at several sizes: every point an ordinary version, all of them on one page."""
