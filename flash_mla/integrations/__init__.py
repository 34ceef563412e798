"""Other libraries' models on flash_mla's paged caches; each file needs the library that it is named after."""
