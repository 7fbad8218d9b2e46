"""A family behind the Open Inference Protocol: one class each for Triton, KServe and MLServer.

All of them answer with `ElasticSession`: a request says `latency_ms` (of the whole batch) or `route`
as a parameter, and gets the logits with the name of the route that gave them. A request that says
neither is answered by the most accurate route. docs/serving.md shows how each is started.
"""
