package nbdexport

import (
	"encoding/binary"
	"slices"
	"strings"
)

// metaContext is a metadata context that the client has selected (section "Metadata querying" of the specification).
type metaContext struct {
	id   uint32
	name string
}

// validContext says whether name is the name of a metadata context: a namespace, a colon, a leaf.
func validContext(name string) bool {
	namespace, leaf, ok := strings.Cut(name, ":")
	return ok && namespace != "" && leaf != "" && validString(name)
}

// contextQuery is the data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT.
type contextQuery struct {
	export  string
	queries []string
}

// parseContextQuery takes the data apart: a length and a name, a count, as many lengths and queries.
func parseContextQuery(data []byte) (q contextQuery, ok bool) {
	if q.export, data, ok = cutString(data); !ok || len(data) < 4 {
		return contextQuery{}, false
	}
	count, data := binary.BigEndian.Uint32(data), data[4:]
	if uint64(count)*4 > uint64(len(data)) {
		return contextQuery{}, false
	}
	for range count {
		var query string
		if query, data, ok = cutString(data); !ok || !strings.Contains(query, ":") {
			return contextQuery{}, false
		}
		q.queries = append(q.queries, query)
	}
	return q, len(data) == 0
}

// cutString cuts a string, which its length precedes, from the start of data.
func cutString(data []byte) (s string, rest []byte, ok bool) {
	if len(data) < 4 {
		return "", nil, false
	}
	length, data := binary.BigEndian.Uint32(data), data[4:]
	if length > maxString || uint64(length) > uint64(len(data)) || !validString(string(data[:length])) {
		return "", nil, false
	}
	return string(data[:length]), data[length:], true
}

// list returns those of the contexts that one of the queries names: by its name, or by a wildcard, which is the beginning
// of a name up to a colon. Without queries these are all.
func (q *contextQuery) list(contexts []string) (found []string) {
	for _, name := range contexts {
		matches := func(query string) bool {
			return query == name || strings.HasSuffix(query, ":") && strings.HasPrefix(name, query)
		}
		if len(q.queries) == 0 || slices.ContainsFunc(q.queries, matches) {
			found = append(found, name)
		}
	}
	return found
}

// selected returns those of the contexts that the queries name, with their identifiers. Wildcards select nothing.
func (q *contextQuery) selected(contexts []string) (found []metaContext) {
	for i, name := range contexts {
		if slices.Contains(q.queries, name) {
			found = append(found, metaContext{id: uint32(i + 1), name: name})
		}
	}
	return found
}

// combine returns what to say of a block that has parts with the flags a and b.
func (c *metaContext) combine(a, b uint64) uint64 {
	switch c.name {
	case ContextAllocation:
		return a & b // a hole, and zero, only if all of it is
	case ContextAllocationDepth:
		return max(a, b)
	default:
		return a | b // dirty if any of it is
	}
}
