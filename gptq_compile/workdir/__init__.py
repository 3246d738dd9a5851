# SPDX-License-Identifier: Apache-2.0
"""Keeps finished work of a compilation on disk, so that an interrupted one goes on where it was."""
