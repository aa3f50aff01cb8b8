"""Steering inside vLLM: entry points that make ``vllm serve`` steer. READ plugin.py FIRST.

API server   middleware.py  body -> ResolvedSteering -> echo       identity.py  mix -> LoRARequest
             host.py        our routes and middleware on vLLM's application      versions.py  reloads of the package
worker       loader.py      θ0 merged while weights are read       worker.py    LoRARequest -> mix -> weights
             slots.py       the batched layer for CPUs          phase.py     prompts that are read unsteered (scheduler too)
             residents.py   the versions of the package that a worker holds
all of them  settings.py    what the environment says              upstream.py  every name that we take from vLLM
"""
