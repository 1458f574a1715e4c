"""The client app that Flower's engines start on every node."""

from samv2.federated.client_app import make_client_app
from samv2.federated.simulation_workers import revive_workers

revive_workers()
app = make_client_app()
