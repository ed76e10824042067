"""Container images without a registry: test bases from Debian, our images from the Dockerfile.

Everything that is made lies in a cache outside the checkout, under a name which is a hash of what it was
made of: an unchanged input costs nothing, an interrupted build leaves nothing that could be taken for whole.
"""
