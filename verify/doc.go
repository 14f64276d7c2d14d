// Package verify decides, purely: which items of a committed result are
// checked, whether two outputs agree, and what follows for the result. It does
// no I/O, reads no clock and uses no randomness of its own, so that anybody
// can repeat every decision from the same inputs. DESIGN.md says why the rules
// are what they are.
package verify
