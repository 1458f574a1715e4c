"""The client app that Flower's engines start on every node."""

from samv2.federated.client_app import make_client_app

app = make_client_app()
