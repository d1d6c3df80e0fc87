"""From a model and a scene to a map of the whole scene.

stream.py   inference over a whole scene in bounded memory
raster.py   the map as GeoTIFF, probabilities as GeoTIFF, areas
picture.py  the map as a picture with a legend
"""
