"""Runs a bundle on a live feed: engines, streaming session, server, client. No torch."""

from __future__ import annotations
