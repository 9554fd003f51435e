"""What `deploy` does, one file per stage; `order` lists them. A version on disk has folders of the same names."""
