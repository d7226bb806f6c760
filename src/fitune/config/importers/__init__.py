"""Translate the configuration files and command lines of other trainers into fitune's keys."""
