package nbdexport

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"
)

// Export is a backend under a name.
type Export struct {
	Name        string // at most 4096 bytes of UTF-8 without NUL
	Description string // for people; the same limits
	Backend     Backend
}

// exports are what one server offers. Names are unique; the first export is the default one.
type exports []Export

// newExports refuses exports that could not be served.
func newExports(es []Export) (exports, error) {
	if len(es) == 0 {
		return nil, errors.New("no exports")
	}
	seen := make(map[string]bool, len(es))
	for _, e := range es {
		switch {
		case !validString(e.Name) || !validString(e.Description):
			return nil, fmt.Errorf("export %.64q: name and description must be UTF-8 without NUL, at most %d bytes",
				e.Name, maxString)
		case seen[e.Name]:
			return nil, fmt.Errorf("two exports have the name %.64q", e.Name)
		}
		if _, err := inspect(e.Backend); err != nil {
			return nil, fmt.Errorf("export %.64q: %w", e.Name, err)
		}
		seen[e.Name] = true
	}
	return es, nil
}

// find returns the export with this name. The empty name asks for the default export.
func (es exports) find(name string) (Export, bool) {
	for _, e := range es {
		if e.Name == name {
			return e, true
		}
	}
	if name == "" {
		return es[0], true
	}
	return Export{}, false
}

func validString(s string) bool {
	return len(s) <= maxString && utf8.ValidString(s) && !strings.ContainsRune(s, 0)
}
