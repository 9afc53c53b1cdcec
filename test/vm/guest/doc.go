// Package guest holds what the tests of package vm itself have guests do.
package guest
