from opsd_megatron.parallel.device import install

install()  # before the first import of megatron, whichever module of this package comes first
