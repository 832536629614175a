"""Spec -> Job, Service, ConfigMap, NetworkPolicy and CronJob dicts. Pure; names come from the owner."""
