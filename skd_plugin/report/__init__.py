"""`skd report`: one HTML page about one or several run folders, readable without a network.

How it is made, and why so:

- Charts are uPlot's (assets/uPlot.iife.min.js, version 1.6.32, MIT, licence beside it): 50 kB, drawn on canvas, made
  for series over a common axis. plotly's bundle is 4 to 5 MB, a hundred times that; inline SVG from matplotlib would
  have neither hover, nor a choice of metrics, nor smoothing.
- Tables are rendered by jinja2 with autoescape, so they are there without JavaScript and on paper.
- Traces are columns of small integers (traces.py), gzipped, in base64: 5,000 responses of 64 tokens take a few MB.
  The browser unpacks them with DecompressionStream, from Chromium 92, Firefox 113 and Safari 16.4 on. One that lacks
  it shows all but the traces, and says so.
- A Content-Security-Policy in the page forbids every request and every script but the ones written here, by their
  hashes: a response that holds HTML can neither run nor load anything.
"""
