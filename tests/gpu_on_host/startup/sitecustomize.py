"""Read by every process that is started under the pretended GPU."""

from gpu_on_host.install import install

install()
