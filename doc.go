// Package muster is replaced by the reader's guide.
package muster
