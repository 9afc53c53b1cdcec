package attach

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// Auto is the name by which Select takes the first attacher that this kernel can do.
const Auto = "auto"

// Select returns the candidate called name, or with Auto the first one that can be used, and the reason for the
// choice, in words for a log. It fails with ErrUnavailable, saying of each what it lacks, when none can be used, and
// with ErrInvalid when no candidate has that name. The caller closes the candidates that were not taken, if they need
// it.
func Select(ctx context.Context, name string, candidates ...Attacher) (taken Attacher, reason string, err error) {
	var (
		names   []string
		refused []error
	)
	for _, c := range candidates {
		names = append(names, c.Name())
		if name != Auto && name != c.Name() {
			continue
		}
		err := c.Probe(ctx)
		switch {
		case err != nil:
			refused = append(refused, fmt.Errorf("%s: %w", c.Name(), err))
		case name != Auto:
			return c, "asked for by name", nil
		case len(refused) == 0:
			return c, "the kernel has it, and it comes first", nil
		default:
			why := errors.Join(refused...).Error()
			return c, "the kernel has it, and not what comes first: " + strings.ReplaceAll(why, "\n", "; "), nil
		}
	}
	if len(refused) == 0 {
		return nil, "", fmt.Errorf("%w: no attacher is called %q: want %s or one of %s",
			ErrInvalid, name, Auto, strings.Join(names, ", "))
	}
	return nil, "", errors.Join(refused...)
}
