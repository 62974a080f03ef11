"""Methods of numerical linear algebra, built from the operators."""
