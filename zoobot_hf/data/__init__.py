"""From catalogs and folders of galaxy images to datasets."""
