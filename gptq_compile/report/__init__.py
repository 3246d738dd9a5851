# SPDX-License-Identifier: Apache-2.0
"""What a compilation did, as one HTML file that opens offline."""
