"""X-ray: what a trained adapter does to each layer. `report.analyse` for one adapter, `report.compare` for several,
`apart` for both in a process of their own, so that the page never imports torch."""
