package qcow

// FilledByTakers makes whoever finds the reserve empty fill it, and nobody else: what an image does to its file then depends on the requests alone.
func FilledByTakers(o Options) Options {
	o.fillByTakers = true
	return o
}
