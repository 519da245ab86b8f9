"""A small world, and the recipe that trains a whole VLV in it from nothing, on two CPU cores in hours."""
