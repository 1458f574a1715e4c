"""The server app that Flower's engines start."""

from samv2.federated.server_app import make_server_app

app = make_server_app()
