"""A whole family in one process, the route chosen call by call."""

from klas_zoo.runtime.session import ElasticSession as ElasticSession
